"""Resumed training that ends exactly like an unbroken run."""

from .exact_resume_hook import ExactResumeHook

__all__ = ['ExactResumeHook']
