"""`python -m sdlora` is the same as `sdlora`."""

from sdlora.cli.main import main

if __name__ == "__main__":
    main()
