"""stub"""
def evaluate() -> None:
    """Stub."""
