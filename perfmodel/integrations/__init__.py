"""Where users already are: a callback for `transformers.Trainer` (`perfmodel.integrations.trainer`)."""
