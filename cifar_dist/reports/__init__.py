"""Reports: runs, searches and comparisons of runs as pages that need nothing but a browser."""
