"""`python -m flawsift`: the command line."""

from flawsift.cli.main import main

if __name__ == "__main__":
    main()
