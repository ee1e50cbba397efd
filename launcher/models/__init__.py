"""The model before it is trained: fresh weights and those from elsewhere, what is
frozen until when."""
