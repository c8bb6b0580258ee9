//! Requests.

use std::io::Read;

/// What came back.
pub struct Answer {
    pub status: u16,
    headers: ureq::http::HeaderMap,
    body: ureq::Body,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The whole body; a body that breaks off is an error.
    pub fn bytes(self) -> Vec<u8> {
        self.try_bytes().unwrap()
    }

    pub fn try_bytes(self) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.reader().read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    pub fn text(self) -> String {
        String::from_utf8(self.bytes()).unwrap()
    }

    pub fn reader(self) -> impl Read {
        self.body.into_reader()
    }
}

pub fn get(url: &str) -> Answer {
    get_with(url, &[])
}

pub fn get_with(url: &str, headers: &[(&str, &str)]) -> Answer {
    let mut request = agent().get(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    answer(request.call())
}

pub fn head(url: &str) -> Answer {
    answer(agent().head(url).call())
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None);
    config.timeout_global(Some(std::time::Duration::from_secs(120))).build().into()
}

fn answer(called: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Answer {
    let (parts, body) = called.unwrap().into_parts();
    Answer { status: parts.status.as_u16(), headers: parts.headers, body }
}
