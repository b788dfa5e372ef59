"""Make the demo model: dialogues, vocabulary, training, export and scores."""
