"""effcompile."""
