"""What both papers use of a language model: records, templates, models, generation, judges."""
