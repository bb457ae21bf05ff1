"""Signatures of a build's metadata, made where the environment can say who is building."""

from __future__ import annotations

from kernelpress.builder.model import Build
from kernelpress.conventions import METADATA, SIGNATURE
from kernelpress.errors import PublishError


def sign(build: Build) -> tuple[str, ...]:
    """Sign the metadata of every variant with the identity that CI offers (OIDC), through sigstore.

    The bundle is written beside the metadata, where the loader's verifier reads it. Since the metadata holds
    the digest of all other files, it vouches for them too; it is itself no part of the digest.

    Returns:
        The variants that were signed: all of them, or none where the environment offers no identity.

    Raises:
        PublishError: The identity is there, but the signing service refuses it or does not answer.
    """
    # Heavy, and of no use on most machines.
    from sigstore.errors import Error
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityError, IdentityToken, detect_credential
    from sigstore.sign import SigningContext

    for variant in build.variants:
        (build.directory / variant.name / SIGNATURE).unlink(missing_ok=True)
    try:
        credential = detect_credential()
        if credential is None:
            return ()
        identity = IdentityToken(credential)
        context = SigningContext.from_trust_config(ClientTrustConfig.production())
        with context.signer(identity) as signer:
            for variant in build.variants:
                folder = build.directory / variant.name
                bundle = signer.sign_artifact((folder / METADATA).read_bytes())
                (folder / SIGNATURE).write_text(bundle.to_json(), "utf-8")
    except (Error, IdentityError, OSError) as error:
        raise PublishError(
            f"the build cannot be signed: {str(error).strip() or type(error).__name__}; run the job again, or take "
            "away its `id-token` permission to publish unsigned"
        ) from error
    return tuple(variant.name for variant in build.variants)
