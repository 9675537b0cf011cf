"""The subcommands of `pem` that need the server's code, one subject per file. Importing this package is cheap."""
