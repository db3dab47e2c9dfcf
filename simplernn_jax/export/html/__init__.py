"""One HTML file that generates text in any browser, offline."""
