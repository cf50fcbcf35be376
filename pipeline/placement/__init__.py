"""Where stages run, and who starts them again."""
