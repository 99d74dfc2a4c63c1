"""The command line: a thin layer over the pipeline. Heavy libraries are imported inside the commands that need them."""
