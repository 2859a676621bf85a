"""`ddpm studio`: a page on this machine over what the commands do; it calls their functions and holds no maths."""
