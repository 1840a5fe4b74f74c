"""A finished run over HTTP: parsed requests, the model that is served, the application; needs the extra `serve`."""
