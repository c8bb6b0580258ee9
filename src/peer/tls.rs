//! What an `https://` peer has to prove: a certificate that this system's authorities vouch for.
//!
//! Says nothing of what such a peer serves: that is verified like everything else. A client of plain HTTP reads no
//! certificates at all, so that a host without any is no worse off, and a thousand peers do not read them each.

use std::sync::Arc;

use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};

/// The beginnings of an HTTP client for this URL: direct, and with the certificates that it needs.
pub fn http_client(url: &str) -> Result<reqwest::ClientBuilder, rustls::Error> {
    let roots = if url.starts_with("https://") { system_roots() } else { RootCertStore::empty() };
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(reqwest::Client::builder().no_proxy().tls_backend_preconfigured(config))
}

/// From the system's usual places, or `$SSL_CERT_FILE`. Without any, every certificate is one of an unknown issuer, and the
/// peer is told of as failing for that.
fn system_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "certificates of this system can't be read; see $SSL_CERT_FILE");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    roots
}
