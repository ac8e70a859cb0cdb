"""The models, one file per task: the encoder and a head.  `base` holds what they share."""
