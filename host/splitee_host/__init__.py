"""The host: wire, links, boards and the command line."""
