"""One vocabulary for graphs, and the sites found in them."""
