"""`python -m dist_llm`: the command line, also under torchrun."""

from dist_llm.cli.main import main

if __name__ == "__main__":
    main()
