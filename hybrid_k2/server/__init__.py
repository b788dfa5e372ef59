"""The HTTP server: the dialects of OpenAI and Anthropic over one engine that serves many requests."""
