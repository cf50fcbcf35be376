"""Where stages run, who starts them, and where they are to be found now."""
