"""`python -m ldm`, which is what `accelerate launch -m ldm` runs."""

from ldm.cli.main import main

if __name__ == "__main__":
    main()
