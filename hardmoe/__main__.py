"""`python -m hardmoe`: the same command line where its script is not on the PATH, as in a job on a cluster."""

from hardmoe.cli.main import main

if __name__ == "__main__":
    main()
