"""The endpoint: images over HTTP, in the shape of OpenAI's image API, on Ray Serve.

    client -- HTTP --> app.py (ingress, no model) -- handle --> engine.py (model and adapter) --> batcher.py

deploy.py puts the two together and starts them.
"""
