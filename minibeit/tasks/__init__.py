"""One file per task; each model is the encoder and a head.  `base` holds what they share."""
