"""Messages hidden in text that is distributed exactly as the model's own.

A message becomes uniform bytes (`message`), a codec picks each token so that the choice carries
some of them and yet falls with the token's own probability (`codec`, and the two that are one), and
the text is all that travels. Who reads it replays the same steps with the same secret.
"""
