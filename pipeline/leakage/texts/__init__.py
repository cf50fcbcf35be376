"""Short passages of English in the public domain, one a paragraph, that attacks are tried on.

Melville, Austen, Carroll, Dickens (twice), Doyle, Shelley, Stoker, Twain, Lincoln, the Declaration
of Independence, Thoreau, Wells (twice), Barrie, Baum, Stevenson (twice), Darwin, London.
"""
