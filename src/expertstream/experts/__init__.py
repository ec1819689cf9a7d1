"""The core of the project: experts on disk (store), some of them in memory (cache), read as the router selects them."""
