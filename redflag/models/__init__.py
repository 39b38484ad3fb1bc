"""Models to try redflag with: fetching, packing and training them."""
