"""Images and hashtags: where they come from (`sources`), what they mean (`hashtags`) and how they are decoded (`images`)."""
