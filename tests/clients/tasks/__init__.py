"""Programs that the tests run with the clients' own Python; `recipe` is what docs/clients.md says. Each prints what it found as JSON."""
