"""The endpoint: image generation over HTTP on Ray Serve, compatible with OpenAI's images API.

    client -- HTTP --> app.py (ingress, no model) -- handle --> engine.py (model and adapter) --> batcher.py

auth.py checks callers. deploy.py builds the application and starts it.
"""
