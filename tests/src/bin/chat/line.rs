//! `chat.proto` as a compiler would write it: its message and the names of its methods.

/// The name of the service.
pub const SERVICE: &str = "test.v1.Chat";

/// What calls and answers consist of.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Line {
    #[prost(string, tag = "1")]
    pub text: String,
    #[prost(uint32, tag = "2")]
    pub count: u32,
    #[prost(uint32, tag = "3")]
    pub delay_ms: u32,
    #[prost(uint32, tag = "4")]
    pub fail: u32,
    #[prost(string, tag = "5")]
    pub server: String,
    #[prost(string, tag = "6")]
    pub timeout: String,
}
