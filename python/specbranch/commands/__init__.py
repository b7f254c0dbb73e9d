"""The subcommands of the command line, one module each: `run(args) -> exit status`."""
