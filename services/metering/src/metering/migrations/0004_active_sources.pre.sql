-- Closed and retired epochs gather for years; completeness asks for the active sources only.

create index sources_active on sources (hub, source) where standing = 'active';
