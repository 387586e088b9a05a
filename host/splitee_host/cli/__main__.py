"""`python -m splitee_host.cli`: the command line without its entry point."""

from splitee_host.cli import main

main()
