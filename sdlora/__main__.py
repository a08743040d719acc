"""`python -m sdlora` is the same as `sdlora`. Floor 8."""

from sdlora.cli import main

if __name__ == "__main__":
    main()
