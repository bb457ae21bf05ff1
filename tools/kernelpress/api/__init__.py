"""The public interface of a variant, and how it differs from another's."""
