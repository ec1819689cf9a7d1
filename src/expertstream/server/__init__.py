"""The HTTP server: OpenAI's and Anthropic's APIs on one engine."""
