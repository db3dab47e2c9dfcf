"""Export of a trained model to forms that run without this project; see `exporting`."""
