"""`python -m edgeprompt`: the command line."""

from edgeprompt.cli import main

if __name__ == "__main__":
    main(prog_name="edgeprompt")
