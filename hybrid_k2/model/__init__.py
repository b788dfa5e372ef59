"""The model's mathematics: rope, latent attention and its cache, router, mixture, the text model and its loader."""
