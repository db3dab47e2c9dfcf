"""HTTP server with the OpenAI API, for many streams over one compiled decoder."""
