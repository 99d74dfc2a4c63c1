"""The command line: a thin layer over the pipeline. Commands import heavy libraries when they run."""
