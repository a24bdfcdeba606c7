"""dist-llm: change the layout, not the run."""

__version__ = "0.1.0"
