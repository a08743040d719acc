"""`python -m sdlora` is the same as `sdlora`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it in words from the first moment on."""
    try:
        from sdlora.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
