"""`python -m homeloop`: the command."""

from homeloop.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
