"""One file per method, the options that choose them, the driver and the report."""
