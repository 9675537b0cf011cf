"""The subcommands of `pem`, one subject per file. Importing it is cheap."""
