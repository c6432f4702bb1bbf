"""`python -m surgery`, which torchrun and accelerate launch need."""

from surgery.cli import main

if __name__ == "__main__":
    main()
