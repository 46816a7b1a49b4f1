"""Curves, plots and tables from logs; never imports training code."""
